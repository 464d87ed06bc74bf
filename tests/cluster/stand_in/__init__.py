"""A stand-in for the KubeRay operator, for tests alone: where that cannot be installed, RayClusters become pods here.

It does what our charts and our operator rest on, by KubeRay's documented behaviour, and nothing more. On a cluster that
has KubeRay the tests use KubeRay.
"""
