{{/* Name of the RayCluster, which all other names begin with. */}}
{{- define "steadyhelm.name" -}}
{{ .Values.name | default .Release.Name }}
{{- end }}

{{/* Labels of every object of the chart. */}}
{{- define "steadyhelm.labels" -}}
app.kubernetes.io/name: steadyhelm
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: steadyhelm
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of a pod that is not Ray's, which select it too; takes (dict "root" $ "component" NAME). */}}
{{- define "steadyhelm.own" -}}
app.kubernetes.io/name: steadyhelm
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Reference of the image NAME; takes (dict "root" $ "image" NAME). */}}
{{- define "steadyhelm.image" -}}
{{- if regexMatch "[:@]" (base .image) -}}
{{ .image }}
{{- else -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* The Secret with the Ray API's token, under auth_token. */}}
{{- define "steadyhelm.tokenSecret" -}}
{{ .Values.auth.secretName | default (include "steadyhelm.name" .) }}
{{- end }}

{{/* The store of runs; empty where none is known. */}}
{{- define "steadyhelm.store" -}}
{{- if .Values.s3.embedded.enabled -}}
s3://steadyhelm/runs?endpoint=http://{{ include "steadyhelm.name" . }}-s3.{{ .Release.Namespace }}.svc:7070
{{- else -}}
{{ .Values.s3.uri }}
{{- end }}
{{- end }}

{{/* The port of the endpoint in s3.uri; empty where none is given. */}}
{{- define "steadyhelm.storePort" -}}
{{- $endpoint := regexFind "[?&]endpoint=[^&]*" .Values.s3.uri | trimPrefix "?" | trimPrefix "&" | trimPrefix "endpoint=" }}
{{- if and $endpoint (not .Values.s3.embedded.enabled) }}
{{- $host := index (splitList "/" (last (splitList "://" $endpoint))) 0 }}
{{- regexFind ":[0-9]{1,5}$" $host | trimPrefix ":" | default (ternary "80" "443" (hasPrefix "http://" $endpoint)) }}
{{- end }}
{{- end }}

{{/* The Secret with an AWS credentials file, under credentials; empty leaves them to workload identity. */}}
{{- define "steadyhelm.credentialsSecret" -}}
{{- if .Values.s3.embedded.enabled }}{{ include "steadyhelm.name" . }}-s3{{ else }}{{ .Values.s3.credentialsSecret }}{{ end }}
{{- end }}

{{/* What Pod Security "restricted" asks of a pod. */}}
{{- define "steadyhelm.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.uid }}
runAsGroup: {{ int64 .Values.uid }}
fsGroup: {{ int64 .Values.uid }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* What it asks of a container, and a root file system that nobody writes to. */}}
{{- define "steadyhelm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Ends the rendering with every contradiction between values that the schema cannot see. */}}
{{- define "steadyhelm.validate" -}}
{{- $wrong := list }}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$" (include "steadyhelm.name" .)) }}
{{- $wrong = append $wrong (printf "name %q must begin with a letter, have at most 45 lower-case letters, digits and dashes (KubeRay cuts longer names of what belongs to it), and end without a dash: set name, or rename the release" (include "steadyhelm.name" .)) }}
{{- end }}
{{- range $path, $pool := dict "pools.rollout" .Values.pools.rollout "pools.rollout.spot" .Values.pools.rollout.spot "pools.reward" .Values.pools.reward }}
{{- if gt (int $pool.min) (int $pool.max) }}
{{- $wrong = append $wrong (printf "%s.min is %d, but %s.max is %d: lower the former or raise the latter" $path (int $pool.min) $path (int $pool.max)) }}
{{- end }}
{{- end }}
{{- if and .Values.s3.embedded.enabled (or .Values.s3.uri .Values.s3.credentialsSecret) }}
{{- $wrong = append $wrong "s3.embedded.enabled brings a store of its own: leave s3.uri and s3.credentialsSecret empty, or turn it off" }}
{{- end }}
{{- range $egress := .Values.networkPolicy.egress }}
{{- range prepend ($egress.except | default list) $egress.cidr }}
{{- if ne (include "steadyhelm.bare" .) "yes" }}
{{- $wrong = append $wrong (printf "networkPolicy.egress: %s has bits set behind its prefix, which Kubernetes refuses: clear them, or make the prefix longer" .) }}
{{- end }}
{{- end }}
{{- range $egress.except }}
{{- if ne (include "steadyhelm.within" (dict "part" . "whole" $egress.cidr)) "yes" }}
{{- $wrong = append $wrong (printf "networkPolicy.egress: %s is no smaller part of %s, so it cannot be an exception to it (of IPv6 only ::/0 may have exceptions)" . $egress.cidr) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.kueue.queue .Values.autoscaling.enabled (not .Values.kueue.elastic) }}
{{- $wrong = append $wrong "kueue.queue is set, and Kueue refuses clusters that scale themselves: turn autoscaling.enabled off, or kueue.elastic on where Kueue has ElasticJobsViaWorkloadSlices" }}
{{- end }}
{{- if $wrong }}
{{- fail (join "\n" $wrong) }}
{{- end }}
{{- end }}

{{/* "yes" where a block of addresses has no bits set behind its prefix. */}}
{{- define "steadyhelm.bare" -}}
{{- $address := index (splitList "/" .) 0 }}
{{- $bits := index (splitList "/" .) 1 | atoi }}
{{- $width := 8 }}
{{- $parts := splitList "." $address }}
{{- if contains ":" $address }}
{{- $width = 16 }}
{{- $parts = list }}
{{- $given := without (splitList ":" $address) "" | len }}
{{- range $n, $half := splitList "::" $address }}
{{- range ternary (until (int (sub 8 $given))) list (eq $n 1) }}{{ $parts = append $parts "0" }}{{ end }}
{{- range without (splitList ":" $half) "" }}{{ $parts = append $parts (printf "0x%s" .) }}{{ end }}
{{- end }}
{{- end }}
{{- $bare := true }}
{{- range $n, $part := $parts }}
{{- $size := 1 }}
{{- range until (int (sub $width (max 0 (min $width (sub $bits (mul $width $n)))))) }}{{ $size = mul 2 $size }}{{ end }}
{{- if mod (int $part) $size }}{{ $bare = false }}{{ end }}
{{- end }}
{{- if $bare }}yes{{ end }}
{{- end }}

{{/* "yes" where the block .part lies in the block .whole and is smaller; of IPv6 that is known of ::/0 alone. */}}
{{- define "steadyhelm.within" -}}
{{- $part := splitList "/" .part }}
{{- $whole := splitList "/" .whole }}
{{- $smaller := gt (index $part 1 | atoi) (index $whole 1 | atoi) }}
{{- if or (contains ":" .part) (contains ":" .whole) }}
{{- if and $smaller (contains ":" .part) (eq .whole "::/0") }}yes{{ end }}
{{- else if $smaller }}
{{- $bits := index $whole 1 | atoi }}
{{- $same := true }}
{{- $theirs := splitList "." (index $whole 0) }}
{{- range $n, $byte := splitList "." (index $part 0) }}
{{- $size := index (list 256 128 64 32 16 8 4 2 1) (max 0 (min 8 (sub $bits (mul 8 $n)))) }}
{{- if ne (div (atoi $byte) $size) (div (index $theirs $n | atoi) $size) }}{{ $same = false }}{{ end }}
{{- end }}
{{- if $same }}yes{{ end }}
{{- end }}
{{- end }}
