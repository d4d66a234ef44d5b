"""What the benchmarks of single ops share: measuring, recording, running, drawing."""
