"""Other people's models with the layers of this library, and this library's models in other people's programs.

`swap` and `adapters` need torch alone; `timm` and `hf` are imported on demand. The part for lm-eval is
`grassland.train.harness`.
"""
