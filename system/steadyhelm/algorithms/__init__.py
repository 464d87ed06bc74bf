"""Advantages, filters, divergences and losses: pure functions of tensors.

Legend of shapes, the same in every module: ``N`` sequences, ``T`` completion tokens after padding, on either side.
``mask`` [N, T] bool marks the completion's tokens. ``valid`` [N] bool marks the sequences that count; the others
(*unscored* ones) leave statistics and loss, and what their entries hold, NaN included, is never read. A token is
*active* where both hold.

Only ``objective`` knows the run file's types; it turns the ``algorithm`` part into calls of the other modules.
"""
