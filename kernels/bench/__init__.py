"""What the ops are measured against, and how: `python -m grassland.kernels.bench` (`command.py`)."""
