"""The `s3distill` command, one thin module per sub-command (``add_arguments`` and ``run``)."""
