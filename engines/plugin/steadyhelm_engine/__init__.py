"""What Steadyhelm needs inside an engine server: new weights staged and swapped as a whole, and honest seeds.

Installed in the server's environment, it knows nothing of Steadyhelm's own package; the two sides agree on a few names
and on the answers of ``Staged``.
"""
