"""Other people's models with the layers of this library, and this library's models in other people's programs.

`swap` and `adapters` need torch alone; `timm`, `hf` and `lm_eval` are imported on demand.
"""
