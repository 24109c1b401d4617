"""Training: one loop for every task. `python -m grassland.train` lists the commands."""
