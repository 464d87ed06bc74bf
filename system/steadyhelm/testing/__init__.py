"""Public fakes and the one-process oracle for tests."""
