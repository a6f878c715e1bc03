"""Array math of quantization: no files, names or mesh."""
