"""Stage 1 and stage 2: recipes, trainers, and the folder of a run that a kill cannot harm."""
