"""Array math of quantization: codes, scales and the equations that hold. No files, names or mesh."""
