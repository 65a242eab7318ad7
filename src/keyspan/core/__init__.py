"""What is computed: masks, biases, the canonical problem, and the registered operator. Imports torch only."""
