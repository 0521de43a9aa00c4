"""Bytes and seconds of each way to exchange gradients, from sizes alone."""
