"""``moda-ops bench``: the operator, its parts and its peers, timed side by side."""
