"""Does a seed do exactly what it should, on every runtime, quantization and cache?"""
