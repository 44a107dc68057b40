"""What is known about one block: pure tensors, no process group, no framework."""
