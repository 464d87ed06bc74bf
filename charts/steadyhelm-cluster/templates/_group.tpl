{{/* A pool's values over the defaults, as YAML; takes (dict "root" $ "name" POOL). A mount of the pool replaces one of the defaults; the head computes nothing and has no GPU. */}}
{{- define "steadyhelm.pool" -}}
{{- $own := index .root.Values.pools .name }}
{{- $pool := mergeOverwrite (deepCopy .root.Values.defaults) (deepCopy (omit $own "mounts")) }}
{{- if eq .name "head" }}
{{- $_ := set $pool "gpus" 0 }}
{{- end }}
{{- range $path, $mount := $own.mounts }}
{{- $_ := set $pool.mounts $path $mount }}
{{- end }}
{{- toYaml $pool }}
{{- end }}

{{/*
A worker group; takes (dict "root" $ "name" POOL "group" NAME), and "spot" with the spot nodes' values.
With the autoscaler on, `replicas` is its: an upgrade leaves what it is.
*/}}
{{- define "steadyhelm.group" -}}
{{- $root := .root }}
{{- $pool := include "steadyhelm.pool" . | fromYaml }}
{{- $least := $pool.replicas }}
{{- $most := $pool.replicas }}
{{- if hasKey $pool "min" }}
{{- $least = $pool.min }}
{{- $most = ternary $pool.max $pool.min $root.Values.autoscaling.enabled }}
{{- end }}
{{- with .spot }}
{{- $least = .min }}
{{- $most = ternary .max .min $root.Values.autoscaling.enabled }}
{{- $_ := set $pool "tolerations" (concat $pool.tolerations .tolerations) }}
{{- if .required }}
{{- $_ := set $pool "nodeSelector" (merge (deepCopy .nodeSelector) $pool.nodeSelector) }}
{{- else if .nodeSelector }}
{{- $terms := list }}
{{- range $key, $value := .nodeSelector }}
{{- $terms = append $terms (dict "key" $key "operator" "In" "values" (list $value)) }}
{{- end }}
{{- $nodes := get $pool.affinity "nodeAffinity" | default dict }}
{{- $preferred := append (get $nodes "preferredDuringSchedulingIgnoredDuringExecution" | default list) (dict "weight" 100 "preference" (dict "matchExpressions" $terms)) }}
{{- $_ := set $nodes "preferredDuringSchedulingIgnoredDuringExecution" $preferred }}
{{- $_ := set $pool.affinity "nodeAffinity" $nodes }}
{{- end }}
{{- end }}
{{- $replicas := int $least }}
{{- if $root.Values.autoscaling.enabled }}
{{- $live := lookup "ray.io/v1" "RayCluster" $root.Release.Namespace (include "steadyhelm.name" $root) | default dict }}
{{- range dig "spec" "workerGroupSpecs" list $live }}
{{- if eq .groupName $.group }}
{{- $replicas = min (max (int (.replicas | default 0)) (int $least)) (int $most) }}
{{- end }}
{{- end }}
{{- end }}
- groupName: {{ .group }}
  replicas: {{ $replicas }}
  minReplicas: {{ $least }}
  maxReplicas: {{ $most }}
  {{- if $root.Values.autoscaling.enabled }}
  priority: {{ ternary 10 0 (hasKey . "spot") }}
  {{- end }}
  labels: {pool: {{ .name }}}
  resources:
    CPU: {{ $pool.rayCpus | quote }}
    {{- if $pool.gpus }}
    GPU: {{ $pool.gpus | quote }}
    {{- end }}
    pool_{{ .name }}: {{ $pool.slots | quote }}
  rayStartParams:
    object-store-memory: "104857600"
  template: {{- include "steadyhelm.pod" (dict "root" $root "name" .name "pool" $pool) | trim | nindent 4 }}
{{- end }}
