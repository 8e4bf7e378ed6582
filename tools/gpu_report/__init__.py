"""Report of all GPU measurements: `make gpu-report`.

The report itself needs only the standard library. It makes an environment with CUDA builds of both
frameworks, and runs every measurement in its own process there.
"""
