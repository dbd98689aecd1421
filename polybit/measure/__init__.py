"""How much does each layer suffer: calibration statistics and sensitivity signals."""
