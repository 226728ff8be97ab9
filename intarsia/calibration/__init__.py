"""What the model does: calibration text, and the model run over it layer by layer."""
