from mcl_kernels.distributed.cost_model import ExchangePlan, plan_exchange

__all__ = ["ExchangePlan", "plan_exchange"]
