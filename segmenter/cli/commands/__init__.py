"""The commands, a file each. Every one has `run(args) -> exit status`."""
