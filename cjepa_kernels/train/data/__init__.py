"""Images and labels of any source, and the views, masks and batches that are made of them."""
