"""The operator of ``TrainingRun`` resources: a run file as spec, kept going, with its progress as status."""
