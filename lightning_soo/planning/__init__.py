"""What a plan takes on machines that are not here: memory, flops, CPU time, bytes and seconds. No process group."""
