"""What frozen features are worth: probes, corruptions, and the outcome of a comparison."""
