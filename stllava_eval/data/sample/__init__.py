"""Small question sets whose answers are known by construction, made of images in installed packages."""
