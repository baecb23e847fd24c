"""Names that options may take where they are not the keys of a registry."""

WITHOUT_LABELS = ("distill", "distill-all", "hints", "frozen-teacher")  # learn from samples labelled -1
