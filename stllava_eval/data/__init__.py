"""Official data sets become checked rows: images, questions and references."""
