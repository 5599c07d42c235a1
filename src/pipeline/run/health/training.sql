-- The distance of the trained model from the start model, in nats per answer: the mean of
-- log p - log p_reference of the answers of the pairs, in the last tenth of the steps. Each round
-- starts from the model of the one before, so the rounds add up.
with per_round as (
  select s.round, sum(s.rewards_chosen + s.rewards_rejected) / count(*) / 2 / {beta} as log_ratio, count(*) as n
  from {steps} s
  join (select round, max(step) as steps from {steps} group by round) whole on whole.round = s.round
  where s.step > 0.9 * whole.steps and {rounds}
  group by s.round
)
select 'log_ratio' as metric, sum(log_ratio) as value, coalesce(sum(n), 0) as n from per_round
