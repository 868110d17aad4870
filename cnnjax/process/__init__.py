"""What a process of training has: settings, signals, streams, and what it prints."""
