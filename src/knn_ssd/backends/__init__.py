"""What executes a target model: the contract, and its two implementations."""
