"""The callback that logs what happens to the adapters, and what it measures."""
