"""Every fault of every dialect: what was damaged, and whether the file is then read, refused, or accepted wrong."""
