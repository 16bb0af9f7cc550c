"""Other trainers' doors to the manager."""
