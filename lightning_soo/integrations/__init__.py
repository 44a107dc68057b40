"""Front doors to other trainers; each imports its trainer only when it is used."""
