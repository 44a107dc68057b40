"""One file per sharding engine: lists this rank's fragments and brackets the engine's step."""
