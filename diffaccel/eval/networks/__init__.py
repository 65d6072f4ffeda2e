"""Feature networks: pictures to numbers, each with its weights and its resize protocol."""
