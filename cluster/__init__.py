"""Many replicas: gateway, groups, command line."""
