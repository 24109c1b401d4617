"""Other libraries' models with the layers of this one. Nothing here is imported by `grassland.archs` itself."""
