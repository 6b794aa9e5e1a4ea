"""The functions that run on the GPU; the modules beside this folder launch them."""
