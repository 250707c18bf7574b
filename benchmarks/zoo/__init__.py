"""Models of other people, and how they are called: what the coverage benchmark exports."""
