"""The evidence matrix: do safety gains hold after quantization?"""
