"""Addresses inside of the node's network, which nothing outside of it sees."""

NODE = "node0"
HOST = "10.240.0.1"
API = f"https://{HOST}:6443"
SERVICES = "10.96.0.0/16"
SERVICE = "10.96.0.1"
"""The API server's, for pods."""
PODS = "10.244.0.0/24"
