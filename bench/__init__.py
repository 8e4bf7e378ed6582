"""Speed and memory, measured: the commands `mc bench`."""
