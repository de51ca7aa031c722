"""The generator of parts and defects, NumPy and OpenCV only: demo line, training, calibration."""
