"""What a block's layers saw in one pass, as answers to the questions approximations ask."""
