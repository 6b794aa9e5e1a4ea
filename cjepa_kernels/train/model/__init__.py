"""The vision transformer and the predictor of a joint-embedding architecture."""
