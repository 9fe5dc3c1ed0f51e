"""Training of the tiny Wan pipeline: procedural clips, and one module for each stage."""
