"""The parts of the benchmark `tailor`."""
