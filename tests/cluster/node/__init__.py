"""A real Kubernetes of one node, of the real programs, in namespaces of its own on this machine.

It takes no container registry, has no way out, and leaves nothing when it ends.
"""
