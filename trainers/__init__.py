"""Data, models and programs that train with the strategies of tf_psops."""
