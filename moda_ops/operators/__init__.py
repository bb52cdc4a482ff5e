"""The operators: of each its public function, its description, and what both stand on."""
